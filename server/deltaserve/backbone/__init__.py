"""transformers opened up: one frozen model whose forward takes packed rows, and the sites in it."""
