"""What is printed on a terminal: live view, tables, dry run."""
