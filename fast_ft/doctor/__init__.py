"""A check of the machine: driver, card, versions, room, network and a small run, with a remedy for each fault."""
