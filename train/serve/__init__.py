"""Questions about pictures answered: by a library, in a terminal, on a page."""
