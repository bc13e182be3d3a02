"""A trained network at work: loaded with all that belongs to it, on images of any size."""
