"""What is measured before and after an edit; one file a family, each number with its protocol and direction."""
