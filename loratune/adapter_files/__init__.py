"""An adapter on disk: PEFT's files, read and written, and the forms it is exported in."""
