"""One command a module: parse, call core, hand the result to the console."""
