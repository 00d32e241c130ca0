"""Names, layout, errors and result variables that all other packages share."""
