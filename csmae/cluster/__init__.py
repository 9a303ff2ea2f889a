"""Ray itself: sessions, authentication, resources, and checks of the nodes before a search starts."""
