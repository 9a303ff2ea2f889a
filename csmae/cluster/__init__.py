"""Ray: sessions, authentication, resources, preemption, and checks of the nodes before a search starts."""
