"""Number formats, path rules that choose them, and the one matmul that obeys."""
