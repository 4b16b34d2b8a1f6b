"""nano_atlas: teacher-student reinforcement learning, small enough to read in an evening."""
