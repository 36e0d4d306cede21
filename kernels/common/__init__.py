"""What all operations share: backends, checks of arguments, noise, scratch memory, launches."""
