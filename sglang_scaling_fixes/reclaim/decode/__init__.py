"""The decode side: `side` is the whole, the other modules are its parts."""
