"""Other libraries' interfaces on flexsparse: change the import and keep the script."""
