"""Engines: whole models as others run them, each from the same folders."""
