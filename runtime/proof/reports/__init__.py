"""What `verify` found, for people and for the tools of continuous integration."""
