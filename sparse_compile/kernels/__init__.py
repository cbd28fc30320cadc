"""The arithmetic, one stage a file: what multiplies the rows that a method chose."""
