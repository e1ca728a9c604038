"""Hostile files, by what they try. Each must be refused with an error that names the file, in a second and 100 MB."""
