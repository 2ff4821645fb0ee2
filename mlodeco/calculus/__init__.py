"""Pure functions: stateless losses, second-derivative products, the reverse sweep."""
