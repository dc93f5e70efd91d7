"""Programs that measured what eval/speed/NOTES.md says, and their raw results; of the checkout alone, not of the wheel."""
