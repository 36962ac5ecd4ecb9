"""The studio as tools of a program that speaks the Model Context Protocol, with the rights of its user."""
