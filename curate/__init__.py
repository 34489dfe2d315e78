"""Pure logic: tables, arrays and image bytes in, tables and arrays out."""
