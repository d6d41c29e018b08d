"""The command line: arguments, commands, tables on the terminal, chat. Everything else is done in the rooms above."""
