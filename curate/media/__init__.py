"""Image bytes and tar members: scan, read, write, decode."""
