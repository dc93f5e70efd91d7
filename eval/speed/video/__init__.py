"""How long a whole video takes, by stage; `bench video` starts it."""
