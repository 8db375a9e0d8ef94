from shipper import Shipper


def test_a_shipped_line_arrives_unchanged(osqbox):
    shipper = Shipper(osqbox.url, str(osqbox.ca_file), osqbox.enroll_secret)
    shipper.ship("usb_devices", {"vendor": "ACME"})
    osqbox.wait_for("log", log_type="result")
    assert osqbox.logs(name="usb_devices")[0]["line"]["columns"] == {"vendor": "ACME"}


def test_a_pack_reaches_a_real_agent(osqbox):
    osqbox.config({"schedule": {"uptime": {"query": "select days from uptime", "interval": 60}}})
    agent = osqbox.agent("laptop-7")
    osqbox.wait_for("config", node=agent.node)
    assert osqbox.query("select count(*) as n from processes where pid = 1") == [{"n": "1"}]


def test_nothing_of_another_test_is_seen(osqbox):
    assert osqbox.nodes == []
    assert osqbox.logs() == []
