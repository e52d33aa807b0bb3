"""How models write thoughts and calls of tools into their answers, and how that is read."""
