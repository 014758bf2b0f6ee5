// Vectors are written out by the stand-in itself.
