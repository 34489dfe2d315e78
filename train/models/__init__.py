"""Model directories: composed, imported, merged; tensor by tensor, in the stock layout."""
