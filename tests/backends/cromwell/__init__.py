"""The Cromwell backend over recordings, and over the stand-in of tests/fakes/cromwell."""
