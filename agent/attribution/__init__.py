"""Maps numbers to names: process, container, pod. Each module has one lookup and one bounded cache; a miss is a value,
never an error."""
