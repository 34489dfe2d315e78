"""Images from the web: fetched safely, checked before they are decoded, every URL accounted for."""
