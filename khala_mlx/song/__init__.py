"""Songs and takes, and what is recorded of them."""
