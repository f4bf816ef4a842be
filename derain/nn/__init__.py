"""Blocks of torch alone that two or more methods are built of."""
