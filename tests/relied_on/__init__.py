"""What programs in the wild rely on in `socketserver`: each habit is a test, run on stdlib and on harken alike."""
