"""Images that a program draws, to pretrain a trunk on."""
