"""The DNS responder: dnsmasq's job on a node, with responses from the address that was asked. Imports nothing from
agent/."""
