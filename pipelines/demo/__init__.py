"""The demo world: pictures with known truth, planted junk, and a small CLIP that sees both."""
