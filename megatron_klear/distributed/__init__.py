"""What crosses ranks: the verbs by which Python objects and arrays are exchanged."""
