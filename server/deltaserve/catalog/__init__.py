"""What exists: names, versions, where their bytes are, and who is using them."""
