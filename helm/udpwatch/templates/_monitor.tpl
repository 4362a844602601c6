{{- /* The endpoint of a PodMonitor or ServiceMonitor; takes the monitor's values. */}}
{{- define "udpwatch.endpoint" -}}
- port: metrics
  path: /metrics
  # namespace, pod and container of a wrong reply are the culprit's; without this they would become exported_namespace ...
  honorLabels: true
  {{- with .interval }}
  interval: {{ . }}
  {{- end }}
  {{- with .scrapeTimeout }}
  scrapeTimeout: {{ . }}
  {{- end }}
  relabelings:
    - sourceLabels: [__meta_kubernetes_pod_node_name]
      targetLabel: node
      action: replace
    # The alerts look for udpwatch in the job's name, whatever the release and its objects are called.
    - targetLabel: job
      replacement: udpwatch
      action: replace
    {{- with .relabelings }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .metricRelabelings }}
  metricRelabelings:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
