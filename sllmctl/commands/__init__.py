"""One command a module: parse, call what is below, hand the result to the console.

What a command needs is imported when it runs: `sllmctl --help` imports them all.
"""
