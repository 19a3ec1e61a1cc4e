"""The layer under other people's trainers: each module needs its library, and nothing else in commlayer needs them."""
