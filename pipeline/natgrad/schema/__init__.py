"""Names, layout, errors and result variables for all other packages."""
