"""The server classes from outside, a file for each thing that one may ask of a server."""
