"""Tools of the uploader's machine: the only code that runs PEFT and reads pickled tensors, in a process of its own."""
