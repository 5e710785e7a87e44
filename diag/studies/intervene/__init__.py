"""Changing attention, layer by layer, and measuring what that costs or gains."""
