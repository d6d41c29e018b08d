"""One folder for each room of fast_ft, what they share in helpers/, and gpu/, bench/, project/ and fuzz/."""
