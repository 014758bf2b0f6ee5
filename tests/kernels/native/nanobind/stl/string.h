// Strings are written out by the stand-in itself.
