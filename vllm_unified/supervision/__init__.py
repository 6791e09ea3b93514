"""supervisord: its configuration as text, and questions to the running one."""
