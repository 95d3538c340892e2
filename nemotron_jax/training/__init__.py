"""Training: state, losses, optimizer, step, loop and what a run writes down."""
