"""The DNS responder: dnsmasq's job on a node, always from the address that was asked. Imports nothing from agent/."""
