"""The wire of the job service: `jobs.proto` and what it shares with every gRPC server, with the code made from them."""
